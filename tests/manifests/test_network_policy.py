"""The network policy closes what UCX cannot: nobody but the cluster's own pods reaches a port that roads listen on."""

from pathlib import Path

import pytest
import yaml

from cluster.config import KvrayConfig

POLICY = Path(__file__).parent.parent.parent / "manifests" / "network-policy.yaml"


@pytest.fixture(scope="module")
def policy():
    (document,) = yaml.safe_load_all(POLICY.read_text())
    return document


def test_it_is_a_policy_for_what_comes_in(policy):
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert set(policy["spec"]) == {"podSelector", "policyTypes", "ingress"}


def test_it_selects_the_clusters_pods_and_not_all(policy):
    assert policy["spec"]["podSelector"]["matchLabels"]


def test_every_rule_names_who_may_come(policy):
    for rule in policy["spec"]["ingress"]:
        assert rule["from"]
        assert all(set(source) == {"podSelector"} for source in rule["from"])


def test_ports_of_roads_are_open_to_the_clusters_own_pods_only(policy):
    own = policy["spec"]["podSelector"]
    low, high = KvrayConfig().network.port_range
    for rule in policy["spec"]["ingress"]:
        if rule["from"] == [{"podSelector": own}]:
            continue
        assert rule["ports"], "all ports, for others than the cluster's own pods"
        for port in rule["ports"]:
            assert not low <= port["port"] <= high
            assert port.get("endPort", port["port"]) < low
