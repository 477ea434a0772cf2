"""The output-length predictor, a separate HTTP service that also trains and evaluates its models.

Packages: ``model`` (features and length models), ``calibration`` (online corrections), ``serving`` (HTTP) and
``training``. INVARIANT: nothing here imports ``gateway`` or ``engine_adapter``, and serving the shipped model never
imports torch.
"""
