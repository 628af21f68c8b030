"""Before a job: is everything in order, and what will it take."""
