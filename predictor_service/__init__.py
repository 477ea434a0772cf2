"""The output-length predictor: a microservice of its own that serves, trains and evaluates one small model.

Nothing here imports ``gateway`` or ``engine_adapter``; serving needs numpy and safetensors, never torch.
"""
