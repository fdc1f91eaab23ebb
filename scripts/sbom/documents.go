package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
	"github.com/google/uuid"
	spdxjson "github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdx/v2/common"
	"github.com/spdx/tools-golang/spdx/v2/v2_3"
)

// tool is what the documents name as their maker.
const tool = "microk8s-sbom"

// digest identifies an inventory, so that documents need no random number.
func (inv Inventory) digest() ([32]byte, error) {
	data, err := json.Marshal(inv)
	return sha256.Sum256(data), err
}

// SPDX writes an inventory as SPDX 2.3 in JSON, dated created.
func SPDX(inv Inventory, created time.Time) ([]byte, error) {
	digest, err := inv.digest()
	if err != nil {
		return nil, err
	}
	doc := &v2_3.Document{
		SPDXVersion: v2_3.Version, DataLicense: v2_3.DataLicense, SPDXIdentifier: "DOCUMENT",
		DocumentName:      inv.file(),
		DocumentNamespace: fmt.Sprintf("https://spdx.org/spdxdocs/%s-%x", inv.file(), digest[:16]),
		CreationInfo: &v2_3.CreationInfo{
			Creators: []common.Creator{{CreatorType: "Tool", Creator: tool}},
			Created:  created.UTC().Format(time.RFC3339),
		},
	}
	relate := func(a common.ElementID, kind string, b common.ElementID) {
		doc.Relationships = append(doc.Relationships, &v2_3.Relationship{
			RefA: common.MakeDocElementID("", string(a)), Relationship: kind, RefB: common.MakeDocElementID("", string(b)),
		})
	}
	add := func(p *v2_3.Package) common.ElementID {
		if p.PackageDownloadLocation == "" {
			p.PackageDownloadLocation = noAssertion
		}
		if p.PackageLicenseConcluded == "" {
			p.PackageLicenseConcluded = noAssertion
		}
		p.PackageLicenseDeclared = p.PackageLicenseConcluded
		p.PackageCopyrightText = noAssertion
		doc.Packages = append(doc.Packages, p)
		return p.PackageSPDXIdentifier
	}
	snap := add(&v2_3.Package{
		PackageName: inv.Name, PackageVersion: inv.Version, PackageSPDXIdentifier: "Snap",
		PackageLicenseConcluded: productLicence, PrimaryPackagePurpose: "APPLICATION",
		PackageExternalReferences: purl(inv.purl()),
	})
	relate("DOCUMENT", common.TypeRelationshipDescribe, snap)
	packages := map[string]common.ElementID{}
	for _, key := range slices.Sorted(maps.Keys(inv.Packages)) {
		p := inv.Packages[key]
		packages[key] = add(&v2_3.Package{
			PackageName: p.Name, PackageVersion: p.Version, PackageSPDXIdentifier: spdxID("Package", key),
			PackageHomePage: p.Source, PackageLicenseConcluded: p.Licence, PackageComment: p.Note,
			PrimaryPackagePurpose: "LIBRARY", PackageExternalReferences: purl(key),
		})
	}
	images := map[string]common.ElementID{}
	for _, img := range inv.Images {
		images[img.Ref] = add(&v2_3.Package{
			PackageName: img.Ref, PackageVersion: img.Digest, PackageSPDXIdentifier: spdxID("Image", img.Ref),
			PackageLicenseConcluded: img.Licence, PrimaryPackagePurpose: "CONTAINER",
			PackageChecksums: []common.Checksum{{Algorithm: common.SHA256, Value: strings.TrimPrefix(img.Digest, "sha256:")}},
		})
		relate(snap, common.TypeRelationshipContains, images[img.Ref])
	}
	for _, p := range inv.Programs {
		id := add(&v2_3.Package{
			PackageName: p.ID(), PackageSPDXIdentifier: spdxID("Program", p.ID()), PackageFileName: p.Path,
			PackageLicenseConcluded: p.Licence, PrimaryPackagePurpose: "APPLICATION",
			PackageChecksums: []common.Checksum{{Algorithm: common.SHA256, Value: p.SHA256}},
		})
		in := snap
		if p.Image != "" {
			in = images[p.Image]
		}
		relate(in, common.TypeRelationshipContains, id)
		for _, use := range p.Uses {
			relate(id, common.TypeRelationshipDependsOn, packages[use])
		}
	}
	var out bytes.Buffer
	err = spdxjson.Write(doc, &out, spdxjson.Indent(" "))
	return out.Bytes(), err
}

// purl is the package URL of the whole.
func (inv Inventory) purl() string { return "pkg:generic/" + inv.Name + "@" + escape(inv.Version) }

// file is the name of its documents, without the ending.
func (inv Inventory) file() string { return fmt.Sprintf("%s_%s_%s", inv.Name, inv.Version, inv.Arch) }

func purl(key string) []*v2_3.PackageExternalReference {
	return []*v2_3.PackageExternalReference{{Category: common.CategoryPackageManager, RefType: common.TypePackageManagerPURL, Locator: key}}
}

// spdxID makes an identifier of letters, digits, points and hyphens, which is unique.
func spdxID(kind, key string) common.ElementID {
	plain := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '-' {
			return r
		}
		return '-'
	}, key)
	return common.ElementID(fmt.Sprintf("%s-%s-%.4x", kind, plain, sha256.Sum256([]byte(key))))
}

// CycloneDX writes an inventory as CycloneDX 1.6 in JSON, dated created.
func CycloneDX(inv Inventory, created time.Time) ([]byte, error) {
	digest, err := inv.digest()
	if err != nil {
		return nil, err
	}
	bom := cdx.NewBOM()
	bom.SerialNumber = uuid.NewSHA1(uuid.NameSpaceURL, digest[:]).URN()
	bom.Metadata = &cdx.Metadata{
		Timestamp: created.UTC().Format(time.RFC3339),
		Tools:     &cdx.ToolsChoice{Components: &[]cdx.Component{{Type: cdx.ComponentTypeApplication, Name: tool}}},
		Component: &cdx.Component{BOMRef: inv.purl(), Type: cdx.ComponentTypeApplication, Name: inv.Name, Version: inv.Version, PackageURL: inv.purl(), Licenses: expression(productLicence)},
	}
	var components []cdx.Component
	var dependencies []cdx.Dependency
	depends := func(ref string, on []string) {
		if len(on) > 0 {
			dependencies = append(dependencies, cdx.Dependency{Ref: ref, Dependencies: &on})
		}
	}
	var top []string
	inImage := map[string][]string{}
	for _, p := range inv.Programs {
		ref := "program:" + p.ID()
		components = append(components, cdx.Component{
			BOMRef: ref, Type: cdx.ComponentTypeApplication, Name: p.ID(), Licenses: expression(p.Licence),
			Hashes: &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: p.SHA256}},
		})
		depends(ref, p.Uses)
		if p.Image == "" {
			top = append(top, ref)
		} else {
			inImage[p.Image] = append(inImage[p.Image], ref)
		}
	}
	for _, img := range inv.Images {
		ref := "image:" + img.Ref
		components = append(components, cdx.Component{
			BOMRef: ref, Type: cdx.ComponentTypeContainer, Name: img.Ref, Version: img.Digest, Licenses: expression(img.Licence),
			Hashes: &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: strings.TrimPrefix(img.Digest, "sha256:")}},
		})
		depends(ref, inImage[img.Ref])
		top = append(top, ref)
	}
	for _, key := range slices.Sorted(maps.Keys(inv.Packages)) {
		p := inv.Packages[key]
		c := cdx.Component{BOMRef: key, Type: cdx.ComponentTypeLibrary, Name: p.Name, Version: p.Version, PackageURL: key, Description: p.Note, Licenses: expression(p.Licence)}
		if p.Source != "" {
			c.ExternalReferences = &[]cdx.ExternalReference{{Type: cdx.ERTypeWebsite, URL: p.Source}}
		}
		components = append(components, c)
	}
	depends(inv.purl(), top)
	bom.Components, bom.Dependencies = &components, &dependencies
	var out bytes.Buffer
	enc := cdx.NewBOMEncoder(&out, cdx.BOMFileFormatJSON)
	enc.SetPretty(true)
	err = enc.EncodeVersion(bom, cdx.SpecVersion1_6)
	return out.Bytes(), err
}

// expression is nil where a licence was not found.
func expression(licence string) *cdx.Licenses {
	if licence == noAssertion || licence == "" {
		return nil
	}
	return &cdx.Licenses{{Expression: licence}}
}
