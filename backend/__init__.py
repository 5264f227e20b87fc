"""What a step costs: GPU and model shapes, analytic and calibrated cost models, the GPU engine."""
