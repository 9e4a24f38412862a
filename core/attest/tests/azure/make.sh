#!/bin/sh
# Makes the certificates of this folder anew: see README.md. Usage: faketime 2026-01-01 make.sh OUTPUT_FOLDER
set -eu
out=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d)
cd "$work"
openssl req -x509 -newkey rsa:2048 -noenc -keyout root.key -sha256 -days 36500 -subj "/CN=test root of virtual TPMs" \
    -addext keyUsage=critical,keyCertSign -out root.pem
openssl req -newkey rsa:2048 -noenc -keyout ak.key -subj "/CN=another VM" -out ak.csr
printf 'keyUsage=critical,digitalSignature\nextendedKeyUsage=2.23.133.8.3\n' > leaf.ext
openssl x509 -req -in ak.csr -CA root.pem -CAkey root.key -set_serial 2 -sha256 -days 36500 -extfile leaf.ext -out ak.pem 2> log
openssl x509 -in root.pem -outform DER -out "$out/root.der"
openssl x509 -in ak.pem -outform DER -out "$out/ak.der"
rm -r "$work"
