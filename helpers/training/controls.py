from ..metrics import scaled_to_effect  # noqa: F401
from .sphere import covariance_vectors  # noqa: F401
