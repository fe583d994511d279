"""Certificates: what no perturbation of a threat set can change."""

from holdfast.certify.bounds import BoundCertifier
from holdfast.certify.certificate import Certificate, Certifier, SoundnessError

__all__ = ["BoundCertifier", "Certificate", "Certifier", "SoundnessError"]
