"""Certificates: what no perturbation of a threat set can change."""

from holdfast.certify.bounds import BoundCertifier
from holdfast.certify.certificate import Certificate, Certifier, SoundnessError
from holdfast.certify.export import export_problems

__all__ = ["BoundCertifier", "Certificate", "Certifier", "SoundnessError", "export_problems"]
