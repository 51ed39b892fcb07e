"""What protects and serves a run: files, caches, processes, checkpoints, pictures.

No module here imports a lesson file (scratchdet, data, train, eval, metrics, detect), so the paper
can be read without opening this folder.
"""
