"""evaluation: what a bundle is worth on a split, measured the way it will be used.

1. report     a split -> every image decoded and scored as classify does -> tables, a picture, metrics.json (last)
2. metrics    truth and logits -> accuracies with intervals, tables by class, confusions; pure functions
3. confusion  counts -> the picture
4. stress     the same split corrupted (corruptions, robustness), and images from outside (outside, doubt, outliers)
5. reading    which images are drawn, their bytes, and the network's answer; stress_page shows what was measured
"""
