"""Tests in a real browser. A package, so that its conftest is not mistaken for that of the other tests."""
