"""trials: the search. One trial is one configuration of one network, trained on the shared block.

1. space        YAML -> typed settings; configuration i is a function of (seed, i)
2. nets         hyper -> network, with weights from a file, a package or the hub, and never a silent random start
3. augment      decoded pixels -> training's random views, as batch operations
4. fit          network + block -> one epoch after another, and the best weights; needs no Ray
5. probe        rung 0: what each backbone's frozen features are worth, so that the better ones' trials run first
6. on_ray       many trials at once under Ray Tune, one ASHA a family
7. train        one configuration without a search, in this process
8. format       the log of (trial, epoch), and the tables and the picture derived from it
"""
