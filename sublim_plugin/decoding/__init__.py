"""Decoding: sampling, engines behind one protocol, and draws that repeat everywhere."""
