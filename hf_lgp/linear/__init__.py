"""The paper's predictor: a low-rank linear map from features and last-layer gradients to a trunk's gradient."""
