"""pages: finished tables -> HTML pages that any browser opens from disk, with no network and no second file.

    leaderboard   a run's trials, curves and what mattered    RUN/leaderboard.html, RUN/curves.png
    evaluation    how often a bundle is right, and where not  OUT/report.html, OUT/confusion.png
    bucket        what finished predictions hold              report.html
    comparison    two runs or two bundles beside each other   OUT/index.html

`templates` renders templates/*.j2, `charts` draws in the page's colours. Names, labels, paths and errors are untrusted
text, never markup. Every chart's figures are in a table or a sentence, too; what cannot be answered is said.
"""
