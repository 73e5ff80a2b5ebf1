"""Prior data in: bytes on disk -> episodes -> typed batches."""
