"""manifest: one Parquet table, one row an image: where it lies, what it shows, which split it is in, and its health.

1. sources        folder, devkit, table or prefix -> candidate rows (uri, label, box, split)
2. prepare        candidate rows -> every image decoded once, hashed, split -> the manifest and its health report
3. manifest_file  the table's schema, its reader, and the images of its rows
"""
