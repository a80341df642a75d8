"""The socket types of the pack. Their names are saved in workflows and never change."""

from comfy_api.latest import io

Concept = io.Custom("ATELIER_CONCEPT")
Exemplars = io.Custom("ATELIER_EXEMPLARS")
Layout = io.Custom("ATELIER_LAYOUT")
GradientRule = io.Custom("ATELIER_GRADIENT_RULE")
LossTerm = io.Custom("ATELIER_LOSS")
Weights = io.Custom("ATELIER_WEIGHTS")
GuidanceBranch = io.Custom("ATELIER_GUIDANCE_BRANCH")
SamModel = io.Custom("ATELIER_SAM")
SamEmbedding = io.Custom("ATELIER_SAM_EMBEDDING")
Detector = io.Custom("ATELIER_DETECTOR")
Trajectory = io.Custom("ATELIER_TRAJECTORY")
