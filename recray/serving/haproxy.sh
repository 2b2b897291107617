#!/bin/sh
# HAProxy as Ray Serve starts it, with six changes to the file that Ray writes: its metrics and statistics listen on loopback (Ray's
# template binds them to all interfaces); a request that does not arrive whole within ten seconds takes no replica's place; what is more
# than the replicas are to take is refused here, where that costs them little; refusals of Serve's own are problem documents like all
# others, and so are HAProxy's own errors; and questions that a replica died over are asked again of another one. What is told is not: only
# who told it knows whether twice is once.
# RECRAY_HAPROXY: the binary itself. RECRAY_PLACES: requests that this HAProxy gives to a replica, working or waiting (unset: as many as
# Serve lets in).
# Arguments: Serve's, -f CONFIG among them.
again='http-request disable-l7-retry unless { path_end /v1/recommend /v1/score /v1/history /v1/similar /v1/models /healthz /readyz }'
waits="option http-buffer-request\n    timeout http-request 10s\n    timeout http-keep-alive 3600s\n"
own() { # an error of HAProxy's own: status, title, detail, fix
    waits="$waits    http-error status $1 content-type application/problem+json $5string \
'{\"title\": \"$2\", \"status\": $1, \"detail\": \"$3\", \"fix\": \"$4\", \"errors\": []}'\n"
}
own 400 'Bad Request' 'this is no HTTP request' 'see /docs'
own 408 'Request Timeout' 'the request did not arrive whole' 'send it at once'
own 413 'Content Too Large' 'the head of the request is too large' 'send less'
own 500 'Internal Server Error' 'the endpoint failed' 'see its log'
own 502 'Bad Gateway' 'a replica failed over the request' 'come again' 'hdr Retry-After 1 '
own 503 'Service Unavailable' 'no replica takes requests now' 'come again' 'hdr Retry-After 1 '
own 504 'Gateway Timeout' 'a replica did not answer in time' 'come again' 'hdr Retry-After 1 '
busy='"title": "Service Unavailable", "status": 503, "fix": "come again", "errors": []'
busy="return status 503 content-type application/problem+json hdr Retry-After 1 string '{$busy"
told="http-response $busy, \"detail\": \"too many requests wait\"}' if { status 503 } { res.hdr(content-type) -m beg text/plain }"
full="http-request set-var(txn.places) nbsrv,mul(${RECRAY_PLACES:-4096})\n    http-request $busy, \"detail\": \"all replicas have what they can take\"}' \
if { nbsrv gt 0 } { be_conn,sub(txn.places) gt 0 } !{ path /healthz /readyz }"
for argument in "$@"; do
    if [ "$previous" = -f ]; then
        sed -i -e '/^frontend prometheus/,/^frontend http/s/bind :/bind 127.0.0.1:/' -e '/^listen stats/,$s/bind \*:/bind 127.0.0.1:/' \
            -e 's/^\( *retry-on\) conn-failure$/\1 conn-failure empty-response/' -e '/^ *errorfile /d' \
            -e "/^defaults/a\\    $waits" \
            -e "/^frontend http_frontend/a\\    $again\\n    $told" -e "/^backend http-recray$/a\\    $full" "$argument"
    fi
    previous=$argument
done
exec "$RECRAY_HAPROXY" "$@"
