"""comparison: two runs over the same images, or two bundles over one manifest, laid beside each other.

    OUT/flips.parquet       label_a, label_b, images and mean scores of every change of label, the most frequent first
    OUT/classes.parquet     images and shares of every label in A and in B, and the change with its interval
    OUT/index.html          the page
    OUT/comparison.json     the headline; the marker, written last
    OUT/a/, OUT/b/          of two bundles: their evaluations

1. build      what is compared with what -> the files above, the page among them
2. measures   two tables of predictions -> counted cells -> headline, flips, classes, histograms
"""
