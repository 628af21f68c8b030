"""manifest: one Parquet table, one row an image: where it lies, what it shows, which split it is in, and its health.

1. sources   folder, devkit, table or prefix -> candidate rows (uri, label, box, split)
2. build     candidate rows -> every image decoded once, hashed, split -> the manifest and its health report
3. format    the table's schema, and the one way to read it
"""
