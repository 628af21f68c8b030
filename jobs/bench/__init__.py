"""bench: the parts of jobs/bench_*.py and drill_*.py.

1. rows, subsets      what every row of results/*.csv says of its origin, and appending one
2. arms      one measured search in a process of its own: carray's, or the one that Ray's documentation teaches (recipe)
3. rates     epochs per core-minute of both, and the fixed cost of a trial
4. replay    known learning curves through the real scheduler, in any order of the trials
5. curves    the curves, their replay, and one live search as a check
6. ranks     rung 0's ranking beside the final one
7. accuracy  what two cores reach in an hour
8. drill, drill_compare, drill_rounds   searches that are killed and go on, compared with one that nobody disturbed
9. classify_figures, classify_watch   rates, slopes and steady state; a job as a whole process, watched from outside
10. classify_setup, classify_arms   folders, bundles, and one run of an arm: carray's, timm's (classify_timm), Ray's
    recipe (classify_recipe)
11. classify_peers, classify_ceiling, classify_parts, classify_report   what is measured, and how it is told
12. query_rows, query_arms   made-up predictions of any number of rows, and one question in a process of its own
13. outside, stress   images that show no car, and a bundle's measurement on them and on corrupted pictures
14. s3_reads   what reading an image from an object store costs
15. scale, scale_books, scale_driver, scale_report   a simulation of many machines, and the constants it stands on
16. hosts_scene, hosts_losses, hosts_drill, hosts_rounds   both jobs on several hosts, which are lost, cut off or slow
17. page_pictures   the pictures of a page as files, for results/
"""
