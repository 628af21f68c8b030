"""core: errors, settings, storage, tables and progress, for every stage."""
