"""How well a checkpoint reads, one task per file; importing it makes the root importable as `nemotron_vl`."""

from tools import ROOT as ROOT
