"""What computes: block-sparse attention and its masks, the FP8 head, embeddings, and the layers around them.

Nothing here imports the training code. Every op takes an `implementation`
(implementation.py), and every fast one sits beside a plain one that says the
same thing in a few lines and serves as its oracle.

    floor 2    layer/                                    the parts of a block; attention is one of them
    floor 1    attention/    head/    embedding/         families that do not know each other
    floor 0    hopper/    block_mask on masks    implementation    what they share
"""
