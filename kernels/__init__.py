"""What computes: block-sparse attention, its masks, and the fused loss head.

Nothing here imports the training code. Every fast implementation sits beside
a plain one that says the same thing in a few lines and serves as its oracle.
"""
