"""Everything that carray asks of Ray itself: connecting, growing, metrics."""
