"""Training and evaluation of length models.

Data: ``sharegpt``, ``datasets``. Fitting: ``fit``, ``ridge`` (CPU model), ``fit_classifier`` (the paper's model),
``checkpoint``. ``evaluate`` computes metrics, ``run`` combines all of it for the commands ``train`` and ``evaluate``.
"""
