"""evaluation: what a bundle is worth on a split, where it is wrong, and what of it can be trusted.

1. report       a split -> tables, pictures, page, metrics.json (last)
2. score        every image decoded and scored as classify does; one row an image
3. metrics      truth and logits -> headline with intervals, tables by class, confusions; pure functions
4. levels       which parts of a vehicle's name were right, and kinds of mistakes; pure functions
5. calibration  whether scores are true, and what thresholds accept; pure functions
6. examples     small pictures of mistaken images
7. confusion    counts -> the matrix as a picture; figures draws all others
8. page         tables -> report.html, made of sections/
9. recalibrate  another precision -> the bundle's threshold
10. stress      the same split corrupted (corruptions, robustness), and images from outside (outside, doubt, outliers)
11. reading     which images are drawn for that, their bytes, and the network's answer; stress_page shows it
12. format      the names and columns of an evaluation's files
"""
