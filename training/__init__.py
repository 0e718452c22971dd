"""Nano's documents and its training road; importing it makes the root importable as `nemotron_vl`."""

from tools import ROOT as ROOT
