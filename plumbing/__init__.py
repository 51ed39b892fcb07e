"""All that a run needs besides the method: file readers, cache, processes, checkpoints, pictures.

You can understand the paper without opening this folder. No module here imports a lesson file
(scratchdet, data, train, eval, metrics, detect).
"""
