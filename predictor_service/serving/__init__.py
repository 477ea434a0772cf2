"""The predictor's HTTP service.

Requests: ``app`` (routes), ``wire`` (request and response bodies), ``batching`` (dynamic batching), ``metrics``.
Background work: ``learning`` (calibration), ``collecting`` (training data). ``process`` runs it all under uvicorn.
"""
