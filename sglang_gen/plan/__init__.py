"""Decisions made before any weight is read: backend, parallel degrees, image size, dtype, and checks of the request."""
