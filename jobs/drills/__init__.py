"""The drills: they disturb commands at random moments, resume them, and check what is left; each is run as a module.

python -m jobs.drills.tune       searches that are killed and resumed
python -m jobs.drills.classify   a classification under 16 kinds of fault
python -m jobs.drills.cluster    both jobs on several hosts that are lost, cut off or slow
python -m jobs.drills.stop       each long command, stopped by Ctrl-C and SIGTERM
python -m jobs.drills.fuzz       every reader of foreign files, fuzzed
"""
