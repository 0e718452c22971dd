"""Fine-tuning of any checkpoint of the family; importing it makes the root importable as `nemotron_vl`."""

from tools import ROOT as ROOT
