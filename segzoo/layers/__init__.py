"""Building blocks: attention, fewer tokens (reduction, merging), feed-forward, embeddings, convolutions.

Shape suffixes, used in every file of this package and of `segzoo.models`:

    B batch   C channels   H, W rows and columns of a map   N query tokens   M key/value tokens   K classes

`x_BHWC` is a map whose channels are innermost: its tokens are `x_BHWC.flatten(1, 2)` without a copy, and
`x_BHWC.permute(0, 3, 1, 2)` is the channels-last (B, C, H, W) tensor that a convolution wants, without a copy.
"""
