"""What every stage stands on: errors, settings, storage, tables and progress. Knows nothing of images or models."""
