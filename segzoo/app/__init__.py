"""The page of `segzoo app`: a picture, the reduction, the mask, the cost.

The files in the order of the walk: `shelf` (which models are at hand), `bench` (what a click computes, which needs no
page), `pieces` (what the page shows of it), `page` (the page itself, by Gradio, and how it is served).
"""
