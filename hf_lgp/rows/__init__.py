"""The row walk: the backward of a stack of blocks, block by block, each re-run on a few rows under autograd."""
