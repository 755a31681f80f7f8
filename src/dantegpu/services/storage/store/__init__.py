"""The port to where objects lie, and the keys under which they do.

base        the port: what every store can do; tests/conformance/test_object_stores.py holds for each
embedded    a folder of this machine, whose presigned URLs rest.py serves
s3          S3 or anything that speaks its protocol (MinIO, Ceph, ...)
"""
