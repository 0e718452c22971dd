"""Tests; importing them makes the root importable as `nemotron_vl`."""

from tools import ROOT as ROOT
