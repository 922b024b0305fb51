"""What others wrote: models on disk and in memory, read and written a chunk at a time. It knows no superposition."""
