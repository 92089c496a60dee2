#!/usr/bin/env bash
# TLS between a cluster's nodes. Once, on your own machine, before ray up, which carries it to the nodes beside the token:
#     bash deploy/tls.sh authority          # ~/.ray/tls: a certificate authority of your own
# On each node the cluster files do the rest, before ray start: a certificate of the node's own, and Ray's variables.
#     . deploy/tls.sh
if [ "${1:-}" = authority ]; then
    umask 077
    mkdir -p ~/.ray/tls
    [ ! -e ~/.ray/tls/ca.key ] || { echo "There is one in ~/.ray/tls already." >&2; exit 1; }
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 -subj /CN=avray \
        -keyout ~/.ray/tls/ca.key -out ~/.ray/tls/ca.crt
else
    (
        umask 077
        mkdir -p ~/.ray/tls-node && cd ~/.ray/tls-node || exit 1
        names="subjectAltName=DNS:localhost,DNS:$(hostname),IP:127.0.0.1$(for one in $(hostname -I); do printf ',IP:%s' "$one"; done)"
        openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$(hostname)" \
            -keyout node.key -out node.csr 2>/dev/null &&
            openssl x509 -req -in node.csr -days 825 -CA ~/.ray/tls/ca.crt -CAkey ~/.ray/tls/ca.key -CAcreateserial \
                -CAserial ca.srl -extfile <(echo "$names") -out node.crt 2>/dev/null ||
            { echo "No certificate could be made from ~/.ray/tls: bash deploy/tls.sh authority, then ray up." >&2; exit 1; }
    ) && export RAY_USE_TLS=1 RAY_TLS_CA_CERT=~/.ray/tls/ca.crt RAY_TLS_SERVER_CERT=~/.ray/tls-node/node.crt \
        RAY_TLS_SERVER_KEY=~/.ray/tls-node/node.key
fi
