"""evaluation: what a bundle is worth on a split, where it is wrong, and what of it can be trusted.

1. report       a split -> tables, pictures, page, metrics.json (last)
2. score        every image decoded and scored as classify does; one row an image
3. metrics      truth and logits -> headline with intervals, kinds of mistakes, calibration; pure functions
4. figures      tables -> pictures
5. page         tables -> report.html, made of sections/
6. recalibrate  another precision -> the bundle's threshold
7. stress       the same split corrupted (corruptions, robustness), and images from outside (outside)
8. reading      which images are drawn for that, their bytes, and the network's answer
9. format       the names and columns of an evaluation's files
"""
