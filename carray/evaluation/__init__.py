"""evaluation: how accurate a bundle is on a split, which mistakes it makes, and how calibrated it is.

evaluate           a split -> tables, pictures, page, metrics.json (last)
score              every image decoded and scored as classify does; one row an image
metrics            truth and logits -> headline with intervals, kinds of mistakes, calibration; pure functions
recalibrate        another precision -> the bundle's threshold
stress             the same split corrupted (corruptions), and images that show something else (outside)
evaluation_folder  the names and columns of an evaluation's files, and what a folder holds already
"""
