"""Certificates: what no perturbation of a threat set can change."""

from holdfast.certify.bounds import BoundCertifier
from holdfast.certify.certificate import Certificate, Certifier, SoundnessError
from holdfast.certify.export import export_problems
from holdfast.certify.lipschitz import LipschitzCertifier

__all__ = ["BoundCertifier", "Certificate", "Certifier", "LipschitzCertifier", "SoundnessError", "export_problems"]
