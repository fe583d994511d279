"""Certificates: what no perturbation of a threat set can change."""

from holdfast.certify.bounds import BoundCertifier
from holdfast.certify.branch_and_bound import BranchAndBoundCertifier, Verification, verify
from holdfast.certify.certificate import Certificate, Certifier, Examples, Findings, SoundnessError
from holdfast.certify.confidence import clopper_pearson_lower, smoothing_radius
from holdfast.certify.export import export_problems
from holdfast.certify.lipschitz import LipschitzCertifier
from holdfast.certify.nearest_neighbour import NearestNeighbourCertifier
from holdfast.certify.smoothed import SmoothedClassifier
from holdfast.certify.smoothing import PlugInSmoothing, SmoothingCertifier

__all__ = [
    "BoundCertifier",
    "BranchAndBoundCertifier",
    "Certificate",
    "Certifier",
    "Examples",
    "Findings",
    "LipschitzCertifier",
    "NearestNeighbourCertifier",
    "PlugInSmoothing",
    "SmoothedClassifier",
    "SmoothingCertifier",
    "SoundnessError",
    "Verification",
    "clopper_pearson_lower",
    "export_problems",
    "smoothing_radius",
    "verify",
]
