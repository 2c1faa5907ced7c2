"""Operations with more than one way to do them, one door each: a caller never asks what the machine is."""
