"""The stages of nano's training, see docs/nano.md; importing it makes the root importable as `nemotron_vl`."""

from tools import ROOT as ROOT
