#!/bin/sh
# Makes the certificates and revocation lists of this folder anew: see README.md. Usage: make.sh OUTPUT_FOLDER
set -eu
out=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d)
cd "$work"
pss="-sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:48 -sigopt rsa_mgf1_md:sha384"
chip=$(printf '09:%.0s' $(seq 64))
cat > ca.cnf <<CNF
[ca]
default_ca=d
[d]
database=index
new_certs_dir=.
serial=serial
default_md=sha384
policy=p
unique_subject=no
crlnumber=crlnumber
[p]
commonName=supplied
[root]
basicConstraints=critical,CA:TRUE
keyUsage=critical,keyCertSign,cRLSign
[issuer]
basicConstraints=critical,CA:TRUE,pathlen:0
keyUsage=critical,keyCertSign
crlDistributionPoints=URI:https://kdsintf.example/vcek/v1/Milan/crl
[vcek]
1.3.6.1.4.1.3704.1.1=DER:02:01:00
1.3.6.1.4.1.3704.1.2=DER:16:05:4d:69:6c:61:6e
1.3.6.1.4.1.3704.1.3.1=DER:02:01:04
1.3.6.1.4.1.3704.1.3.2=DER:02:01:00
1.3.6.1.4.1.3704.1.3.3=DER:02:01:18
1.3.6.1.4.1.3704.1.3.8=DER:02:02:00:d5
1.3.6.1.4.1.3704.1.4=DER:${chip%:}
[vlek]
1.3.6.1.4.1.3704.1.1=DER:02:01:00
1.3.6.1.4.1.3704.1.2=DER:16:05:4d:69:6c:61:6e
1.3.6.1.4.1.3704.1.3.1=DER:02:01:04
1.3.6.1.4.1.3704.1.3.2=DER:02:01:00
1.3.6.1.4.1.3704.1.3.3=DER:02:01:18
1.3.6.1.4.1.3704.1.3.8=DER:02:02:00:d5
1.3.6.1.4.1.3704.1.5=DER:16:05:63:6c:6f:75:64
CNF
: > index
echo 010000 > serial
echo 01 > crlnumber
rsa() { openssl genpkey -quiet -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out "$1.key"; }
p384() { openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out "$1.key"; }
# name, common name, issuer ('' for itself), extensions
certify() {
    openssl req -new -key "$1.key" -subj "/CN=$2" -out "$1.csr" -sha384
    if [ -z "$3" ]; then by="-selfsign -keyfile $1.key"; else by="-cert $3.pem -keyfile $3.key"; fi
    # shellcheck disable=SC2086
    openssl ca -batch -notext -config ca.cnf -in "$1.csr" -out "$1.pem" $by $pss -extensions "$4" -startdate 20250101000000Z -enddate 20350101000000Z 2> log || { cat log; exit 1; }
    openssl x509 -in "$1.pem" -outform DER -out "$out/$1.der"
}
rsa ark && certify ark ARK-Milan '' root
rsa ask && certify ask SEV-Milan ark issuer
rsa asvk && certify asvk SEV-VLEK-Milan ark issuer
p384 vcek && certify vcek SEV-VCEK ask vcek
p384 vlek && certify vlek SEV-VLEK asvk vlek
crl() {
    # shellcheck disable=SC2086
    openssl ca -gencrl -config ca.cnf -cert ark.pem -keyfile ark.key $pss -crl_lastupdate 20260101000000Z -crl_nextupdate 20270101000000Z -out crl.pem 2> log || { cat log; exit 1; }
    openssl crl -in crl.pem -outform DER -out "$out/$1.der"
}
crl crl-none
openssl ca -config ca.cnf -cert ark.pem -keyfile ark.key -revoke ask.pem $pss 2> log || { cat log; exit 1; }
crl crl-ask
for key in vcek vlek; do openssl pkcs8 -topk8 -nocrypt -in "$key.key" -outform DER -out "$out/$key.pk8"; done
rm -r "$work"
