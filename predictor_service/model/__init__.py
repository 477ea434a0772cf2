"""Length models: prompt in, quantiles of the output length out.

Prompt to numbers: ``features``, ``hashed_text``, ``lexical``. CPU model: ``length_model``, ``trees``, ``quantiles``.
The paper's model: ``classifier``, ``buckets``. Trained weights: the folder ``shipped``.
"""
