"""The one store: artifacts and images, on local disks and S3."""
