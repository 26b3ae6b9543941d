"""Bridges to other libraries; each file needs the library that it is named after only when it is used."""
