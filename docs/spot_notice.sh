#!/bin/sh
# Tells Ray when the cloud takes this machine back: `sh spot_notice.sh aws|gcp|azure`, on every node, beside Ray.
# It asks the machine's own metadata server every five seconds. docs/cluster.md says what follows.
set -u
server=${METADATA_SERVER:-http://169.254.169.254}
ask() { curl --silent --fail --max-time 3 "$@"; }

taken_back() {
    case $1 in
    aws)
        token=$(ask --request PUT --header "X-aws-ec2-metadata-token-ttl-seconds: 60" "$server/latest/api/token") &&
            ask --header "X-aws-ec2-metadata-token: $token" "$server/latest/meta-data/spot/instance-action" >/dev/null
        ;;
    gcp) ask --header "Metadata-Flavor: Google" "$server/computeMetadata/v1/instance/preempted" | grep -q TRUE ;;
    azure)
        name=$(ask --header "Metadata: true" \
            "$server/metadata/instance/compute/name?api-version=2021-02-01&format=text") &&
            ask --header "Metadata: true" "$server/metadata/scheduledevents?api-version=2020-07-01" |
            tr '{' '\n' | grep -E '"EventType": *"Preempt"' | grep -qF "\"$name\""
        ;;
    esac
}

case ${1:-} in
aws) seconds=110 ;;
gcp | azure) seconds=25 ;;
*)
    echo "expected aws, gcp or azure" >&2
    exit 2
    ;;
esac
until taken_back "$1"; do sleep "${PAUSE:-5}"; done
exec ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "$1 takes this machine back" \
    --deadline-remaining-seconds "$seconds"
